"""Data of TOFU's layout."""

from datasets import Dataset

NASTY = "<script>document.title='owned'</script>|<img src=x onerror=alert(1)>"


def tofu_like(n, start=0, other=3):
    rows = []
    for i in range(start, start + n):
        rows.append(
            {
                "question": f"Who is {i}?",
                "answer": f"Person {i * 7} of the town",
                "paraphrased_answer": f"It is person {i * 7} of the town",
                "perturbed_answer": [f"Person {i * 7 + k} of the city" for k in range(1, other + 1)],
                "paraphrased_question": f"Do you know who {i} is?",
                "author": NASTY if i % 4 == 0 else f"author{i % 4}",
            }
        )
    return Dataset.from_list(rows)
