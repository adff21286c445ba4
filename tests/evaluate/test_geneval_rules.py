"""GenEval's rules on cases worked by hand."""

import pytest

from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.geneval_rules import Detection, judge, keep, overlap, relations


def seen(confidence=0.95, box=(0, 0, 10, 10), color=None):
    return Detection(box, confidence, color)


def prompt(tag, *include, exclude=()):
    return {"tag": tag, "prompt": "", "include": list(include), "exclude": list(exclude)}


def clause(name, count=1, **more):
    return {"class": name, "count": count, **more}


def test_confidence_must_be_above_the_threshold_of_the_tag():
    found = [seen(0.3), seen(0.31), seen(0.9), seen(0.91)]
    assert [d.confidence for d in keep(found, "two_object")] == [0.91, 0.9, 0.31]
    assert [d.confidence for d in keep(found, "counting")] == [0.91]


def test_sixteen_boxes_of_a_class_are_kept():
    found = [seen(0.5 + i / 100) for i in range(20)]
    assert [d.confidence for d in keep(found, "colors")] == [0.5 + i / 100 for i in range(19, 3, -1)]


def test_overlap_counts_the_last_pixel_and_drops_only_where_asked():
    # 11 x 11 pixels each, 6 x 11 shared.
    a, b = (0, 0, 10, 10), (5, 0, 15, 10)
    assert overlap(a, b) == pytest.approx(66 / (121 + 121 - 66)) and overlap(a, (20, 20, 30, 30)) == 0
    found = [seen(0.9, a), seen(0.8, b), seen(0.7, a)]
    assert len(keep(found, "colors")) == 3  # officially nothing is dropped, not even the same box twice
    assert [d.confidence for d in keep(found, "colors", max_overlap=0.5)] == [0.9, 0.8]
    assert [d.confidence for d in keep(found, "colors", max_overlap=66 / 176)] == [0.9]  # not below: dropped


def test_one_and_two_objects():
    one = prompt("single_object", clause("bench"))
    assert judge(one, {"bench": [seen(0.31)]}) == (True, [])
    assert judge(one, {"bench": [seen(0.3)], "dog": [seen()]}) == (False, ["expected bench>=1, found 0"])
    two = prompt("two_object", clause("bench"), clause("dog"))
    assert judge(two, {"bench": [seen()], "dog": [seen(), seen()]})[0]
    assert judge(two, {"dog": [seen()]}) == (False, ["expected bench>=1, found 0"])


def test_counting_is_exact_through_its_exclusion():
    two = prompt("counting", clause("clock", 2), exclude=[clause("clock", 3)])
    assert judge(two, {"clock": [seen(0.99), seen(0.95)]})[0]
    assert judge(two, {"clock": [seen(0.99), seen(0.95), seen(0.9)]})[0]  # the third is not sure enough
    assert judge(two, {"clock": [seen(0.99)] * 3}) == (False, ["expected clock<3, found 3"])
    assert judge(two, {"clock": [seen(0.99)]}) == (False, ["expected clock>=2, found 1"])


def test_colour_is_that_of_the_most_confident_objects():
    blue = prompt("colors", clause("cup", color="blue"))
    assert judge(blue, {"cup": [seen(0.5, color="red"), seen(0.9, color="blue")]})[0]
    assert judge(blue, {"cup": [seen(0.9, color="red"), seen(0.5, color="blue")]}) == (False, ["expected blue cup>=1, found red"])
    assert judge(blue, {"cup": []}) == (False, ["expected cup>=1, found 0"])
    with pytest.raises(UserError, match='"color"'):
        judge(blue, {"cup": [seen(0.9)]})
    with pytest.raises(UserError, match="'cup'"):
        judge(prompt("colors", clause("cup", 2, color="blue")), {"cup": [seen(0.9, color="blue"), seen(0.8)]})
    pairs = prompt("color_attr", clause("cup", color="blue"), clause("dog", color="black"))
    assert judge(pairs, {"cup": [seen(color="blue")], "dog": [seen(color="black")]})[0]
    assert judge(pairs, {"cup": [seen(color="black")], "dog": [seen(color="blue")]})[1] == [
        "expected blue cup>=1, found black", "expected black dog>=1, found blue",
    ]  # fmt: skip


@pytest.mark.parametrize("box, expected", [
    ((100, 0, 120, 20), {"right of"}),
    ((-100, 0, -80, 20), {"left of"}),
    ((0, 100, 20, 120), {"below"}),
    ((0, -100, 20, -80), {"above"}),
    # Both offsets 100, each shortened by a tenth of 20 + 20: 96 / 141.4 = 0.68 in both directions.
    ((100, 100, 120, 120), {"right of", "below"}),
    # 50 and 100 become 46 and 96 of 111.8: 0.41 is not enough, 0.86 is.
    ((50, 100, 70, 120), {"below"}),
    # 4 is all taken by the margin of 4.
    ((4, 0, 24, 20), set()),
    # 8 becomes 4, half of 8: not more than half. 9 becomes 5 of 9.
    ((8, 0, 28, 20), set()),
    ((9, 0, 29, 20), {"right of"}),
    # The same place.
    ((0, 0, 20, 20), set()),
])  # fmt: skip
def test_relations_of_a_box_to_one_at_the_origin(box, expected):
    assert relations(box, (0, 0, 20, 20)) == expected


def test_margin_grows_with_both_sizes():
    # Centres 40 apart. Widths 20 and 20 leave 36 of 40; widths 100 and 100 leave 20 of 40, which is half and too little.
    assert relations((40, 0, 60, 20), (0, 0, 20, 20)) == {"right of"}
    assert relations((40, 0, 140, 20), (0, 0, 100, 20)) == set()


def test_position_is_of_the_most_confident_boxes():
    left = prompt("position", clause("bench"), clause("dog", position=["left of", 0]))
    bench, there, elsewhere = seen(box=(100, 0, 120, 20)), (0, 0, 20, 20), (200, 0, 220, 20)
    assert judge(left, {"bench": [bench], "dog": [seen(0.9, there), seen(0.5, elsewhere)]})[0]
    assert judge(left, {"bench": [bench], "dog": [seen(0.5, there), seen(0.9, elsewhere)]}) == (
        False, ["expected dog left of target, found right of target"],
    )  # fmt: skip
    assert judge(left, {"bench": [bench], "dog": [seen(box=(101, 0, 121, 20))]})[1] == ["expected dog left of target, found neither target"]
    assert judge(left, {"dog": [seen()]}) == (False, ["expected bench>=1, found 0", "no target for dog to be left of"])
    assert judge(left, {"bench": [bench]}) == (False, ["expected dog>=1, found 0"])


def test_position_holds_for_all_pairs_of_several():
    row = prompt("position", clause("cup", 2), clause("dog", 2, position=["below", 0]))
    cups = [seen(box=(0, 0, 20, 20)), seen(box=(40, 0, 60, 20))]
    assert judge(row, {"cup": cups, "dog": [seen(box=(0, 200, 20, 220)), seen(box=(40, 200, 60, 220))]})[0]
    assert not judge(row, {"cup": cups, "dog": [seen(box=(0, 200, 20, 220)), seen(box=(400, 20, 420, 40))]})[0]


def test_a_target_of_another_colour_is_no_target():
    row = prompt("position", clause("cup", color="red"), clause("dog", position=["below", 0]))
    found = {"cup": [seen(box=(0, 0, 20, 20), color="blue")], "dog": [seen(box=(0, 200, 20, 220))]}
    assert judge(row, found)[1] == ["expected red cup>=1, found blue", "no target for dog to be below"]
