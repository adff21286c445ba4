"""The tables of tools/bench_in_context.py, from episodes whose answers are known."""

from tools import bench_in_context as bench


def episodes(drawn: float, copied: float = 10.0) -> list[dict[str, str]]:
    """Four groups of two queries as they are read from a file; groups differ, by what cancels in every pair."""
    dB = dict(zip(bench.ARMS, (copied, 12.0, 8.0, drawn, 25.0), strict=True))
    return [
        {"level": "parameters", "words": words, "seed": "0", "task": f"task{group % 2}", "group": str(group), "query": str(query)}
        | {f"{arm}/{measure}": str(value + group) for arm, value in dB.items() for measure in bench.MEASURES}
        for words in bench.WORDS
        for group in range(4)
        for query in range(2)
    ]


def test_models_that_share_a_number_are_compared_in_the_same_episodes():
    told = bench.summary(
        {
            "xp": episodes(19.0),
            "xp2400": episodes(16.0),
            "causal2400": episodes(15.0),
            "full2400": episodes(17.0),
        }
    )
    row = lambda name: next(t for t in told if t["model"] == name and t["measure"] == "all" and t["words"] == "generic")
    assert row("xp2400")["beside"] == {"causal2400": [1.0, 1.0, 1.0], "full2400": [-1.0, -1.0, -1.0]}
    assert row("xp2400")["gap closed"] == 0.8 and row("xp2400")["dB"]["full"] == 17 + 1.5
    assert "beside" not in row("xp") and "gap closed" not in row("xp")
    assert row("xp")[f"drawn - {bench.NO_EXAMPLE}"] == [7.0, 7.0, 7.0]
    page = bench.markdown(told)
    assert "| xp2400 - causal2400 | generic | parameters | +1.00 [+1.00, +1.00] |" in page and "| causal2400 - xp2400 |" not in page


def test_a_group_is_one_of_its_level():
    """Groups of two levels may share a name; over all levels they count as two, so one level's lead is half of a lead."""
    both = lambda ahead: episodes(ahead) + [row | {"level": "tasks"} for row in episodes(15.0)]
    told = bench.summary({"xp1": both(16.0), "causal1": both(15.0)})
    row = next(t for t in told if t["model"] == "xp1" and (t["level"], t["words"], t["measure"]) == ("all", "named", "all"))
    (mean, low, high) = row["beside"]["causal1"]
    assert row["episodes"] == 16 and mean == 0.5 and low < 0.5 < high


def test_other_pictures_are_not_the_same_episodes():
    told = bench.summary({"xp1": episodes(16.0), "causal1": episodes(15.0, copied=11.0)})
    assert all("beside" not in t for t in told)


def test_other_questions_are_not_the_same_episodes():
    """With more queries a group has another example; the query's picture alone does not tell."""
    asked = {"groups": 10, "queries": 7, "photos": 300, "guidance": None, "temperature": 0.0}
    both = {"xp1": episodes(16.0), "causal1": episodes(15.0)}
    alike = bench.summary(both, {"xp1": asked, "causal1": asked})
    assert all("beside" in t for t in alike)
    assert all("beside" not in t for t in bench.summary(both, {"xp1": asked, "causal1": asked | {"queries": 3}}))


def test_controls_that_were_not_drawn_are_left_out():
    bare = [row | {f"{arm}/{m}": "" for arm in ("none", "wrong") for m in bench.MEASURES} for row in episodes(15.0)]
    told = bench.summary({"xp1": episodes(16.0), "few1": bare, "full1": bare})
    row = lambda name: next(t for t in told if t["model"] == name and t["measure"] == "all" and t["words"] == "generic")
    assert set(row("few1")["dB"]) == {"copied", "drawn", "ceiling", "full"} and row("few1")["by task"]["task0"] == [None, None, 16.0, 26.0]
    assert not {"drawn - none", "drawn - wrong", "gap closed"} & set(row("few1"))
    assert row("few1")["beside"]["xp1"] == [-1.0, -1.0, -1.0] and row("xp1")["gap closed"] == 1.33
    assert "| few1 | generic | parameters | 2 | 8 | 11.5 |  |  | 16.5 | 26.5 |  |  | 16.5 |  |" in bench.markdown(told)
