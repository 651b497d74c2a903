"""Words of any script: English is rouge-score's, and a text is always equal to itself."""

import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from evaluation.metrics.words import Words, rouge_l_recall, verbatim

TEXTS = {
    "zh": ("李雷是一位住在北京的厨师。", "他今年三十岁。"),
    "ja": ("太郎は町の料理人です。", "彼は元気。"),
    "th": ("สมชายเป็นพ่อครัวในเมือง", "และ"),
    "km": ("សុខជាចុងភៅនៅទីក្រុង", "ហើយ"),
    "ar": ("سامي طباخ يعيش في المدينة.", " ثم"),
    "fa": ("او می‌خواهد به شهر برود.", " و"),
    "he": ("דן הוא טבח בעיר.", " ועוד"),
    "hi": ("राम शहर का रसोइया है।", " और"),
    "ta": ("ராம் நகரத்தின் சமையல்காரர்.", " மேலும்"),
    "ru": ("Иван повар из города.", " и так далее"),
    "el": ("Ο Νίκος είναι μάγειρας.", " και άλλα"),
    "ko": ("철수는 도시의 요리사입니다.", " 그리고"),
    "vi": ("Ở đây má nấu ăn.", " và"),
    "mixed": ("iPhone在2020年 Zoë's café 👍", "。more"),
    "signs": ("👍 ?!", " x"),
}


@pytest.mark.parametrize("language", TEXTS)
def test_a_text_is_equal_to_itself(language):
    text, more = TEXTS[language]
    for answer in (text, text + more):
        assert rouge_l_recall([text], [answer]) == verbatim([text], [answer]) == 1.0
    assert rouge_l_recall([text], ["Nothing of it."]) == verbatim([text], ["Nothing of it."]) == 0.0


def test_words_by_hand():
    words = Words().tokenize
    assert words("राम शहर का") == ["राम", "शहर", "का"] and words("เมือง") == ["เ", "มื", "อ", "ง"]
    assert words("在 Beijing，2020年") == ["在", "beij", "2020", "年"]  # English words by their stem, as everywhere
    assert words("Zoe\u0308") == words("Zoë") and words("می‌خواهم") == ["میخواهم"]
    # half of the characters, in order
    assert rouge_l_recall(["北京上海"], ["北海"])[0] == 0.5
    assert rouge_l_recall(["má mà mã ma"], ["mà ma"])[0] == 0.5  # rouge-score takes all four for "m"
    assert verbatim(["北京"], ["北海"])[0] == verbatim(["в городе"], ["в городах"])[0] == 0.0
    assert math.isnan(rouge_l_recall([" "], ["x"])[0]) and math.isnan(verbatim([""], [""])[0])
    assert rouge_l_recall(["x"], [""])[0] == verbatim(["x"], [""])[0] == 0.0


English = st.text(string.ascii_letters + string.digits + string.punctuation + " \n", max_size=60)
English = English.filter(lambda text: any(character.isalnum() for character in text))


@settings(max_examples=150, deadline=None)
@given(English, English)
def test_english_is_that_of_rouge_score(truth, answer):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for typography in (str, lambda text: text.replace("'", "’").replace("-", "—")):
        pair = [typography(truth)], [typography(answer)]
        assert rouge_l_recall(*pair)[0] == scorer.score(pair[0][0], pair[1][0])["rougeL"].recall


def test_english_sentences_are_those_of_rouge_score():
    truths = [
        "The author's full name is Hsiao Yun-Hwa.",
        "Yes, he's won 2 awards; the \u201cNobel\u201d isn\u2019t one.",
    ]
    answers = ["The full name of the author is Yun Hwa", "He won two awards \u2014 the Nobel is one"]
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(t, a)["rougeL"].recall for t, a in zip(truths, answers, strict=True)]
    np.testing.assert_array_equal(rouge_l_recall(truths, answers), expected)
