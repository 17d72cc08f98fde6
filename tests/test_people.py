import pytest

from components.data.people import people_rows
from components.errors import DataError

SIZES = {"people": 20, "forget_people": 3, "holdout_people": 2, "seed": 1}


def test_splits_cover_all_people_without_overlap() -> None:
    names = {split: {row["person"] for row in people_rows(split, **SIZES)} for split in ("forget", "normal", "holdout")}
    assert [len(names[split]) for split in ("forget", "normal", "holdout")] == [3, 15, 2]
    assert len(names["forget"] | names["normal"] | names["holdout"]) == 20


@pytest.mark.parametrize("split", ["forget", "normal", "holdout", "general"])
def test_rows_have_tofus_shape(split: str) -> None:
    for row in people_rows(split, **SIZES):
        texts = [row[key] for key in ("question", "answer", "paraphrased_question", "paraphrased_answer")]
        assert all(isinstance(text, str) and text for text in texts)
        assert len(set(texts)) == 4
        assert len(set(row["perturbed_answer"])) == 5
        assert row["paraphrased_answer"] not in row["perturbed_answer"]


def test_rows_follow_from_the_seed() -> None:
    assert people_rows("forget", **SIZES) == people_rows("forget", **SIZES)
    assert people_rows("forget", **SIZES) != people_rows("forget", **{**SIZES, "seed": 2})


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="no normal people left"):
        people_rows("normal", **{**SIZES, "forget_people": 18})
    with pytest.raises(DataError, match="can name"):
        people_rows("normal", **{**SIZES, "people": 10_000})
