"""What objectives, metrics, schedules and architectures have in common: names that are taken, unknown, and options."""

import pytest

from cud_trainer.circuits import ARCHITECTURES
from cud_trainer.difficulty import METRICS
from cud_trainer.objectives import OBJECTIVES
from cud_trainer.registry import Registry, check_options
from cud_trainer.schedule import SCHEDULES


@pytest.mark.parametrize(
    ("registry", "kind"),
    [
        (OBJECTIVES, "objective"),
        (METRICS, "difficulty metric"),
        (SCHEDULES, "schedule"),
        (ARCHITECTURES, "architecture"),
    ],
)
def test_names(registry, kind):
    taken = next(iter(registry))
    before = dict(registry)
    with pytest.raises(ValueError, match=f"^{kind} '{taken}' is already registered$"):
        registry.add(taken, None)
    with pytest.raises(ValueError, match=f"^unknown {kind} 'mine'; choose one of \\['.*'\\]"):
        registry.find("mine")
    assert registry == before and registry.find(taken) is registry[taken]


def test_the_choice_is_sorted_and_has_its_hint():
    registry = Registry("tool", hint=", or none")
    registry.add("saw", 1)
    registry.add("axe", 2)
    with pytest.raises(ValueError, match=r"^unknown tool 'pen'; choose one of \['axe', 'saw'\], or none$"):
        registry.find("pen")
    assert list(registry) == ["saw", "axe"]


def cut(wood, *, depth, teeth: int = 3, oil: float | None = None, grip: str = "left", wet: bool = False):
    """An option of every sort."""


class TestOptions:
    def test_check_sees_all_of_them(self):
        seen = {}
        check_options("saw 'a'", cut, {"depth": 1.5}, lambda owner, **options: seen.update(owner=owner, **options))
        assert seen == {"owner": "saw 'a'", "depth": 1.5, "teeth": 3, "oil": None, "grip": "left", "wet": False}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"deep": 1}, r"saw 'a' has no option 'deep'; it has \['depth', 'grip', 'oil', 'teeth', 'wet'\]"),
            ({"wood": 1}, "saw 'a' has no option 'wood'"),
            ({"teeth": 1}, "saw 'a' needs option 'depth'"),
            ({"depth": None}, "option 'depth' of saw 'a' must be a number, got None"),
            ({"depth": 1, "teeth": "3"}, "option 'teeth' of saw 'a' must be a number, got '3'"),
            ({"depth": 1, "teeth": True}, "option 'teeth' of saw 'a' must be a number, got True"),
            ({"depth": 1, "teeth": None}, "option 'teeth' of saw 'a' must be a number, got None"),
            ({"depth": 1, "oil": "much"}, "option 'oil' of saw 'a' must be a number, got 'much'"),
        ],
    )
    def test_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            check_options("saw 'a'", cut, options)

    def test_what_need_not_be_a_number(self):
        check_options("saw 'a'", cut, {"depth": 1, "oil": None, "grip": "right", "wet": True})
        check_options("saw 'a'", cut, {"depth": "deep", "teeth": "3"}, numbers=False)

    def test_a_function_without_options(self):
        with pytest.raises(ValueError, match="saw 'a' has no option 'teeth'; it has none"):
            check_options("saw 'a'", lambda wood: wood, {"teeth": 3})
