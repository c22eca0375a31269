"""The verdict of a comparison, on hits that are made up so that the answer is known."""

import numpy as np
import pytest

from headplug.compare.summary import summarize, summary_rows

IMAGES = 400


def run(head, seed, **val):
    rows = [
        {"tap": t, "probe": "linear", "val_accuracy": v, "selected_on": "held out"}
        for t, v in val.items()
    ]
    return {"head": head, "seed": seed, "taps": rows}


def made(share, offset=0):
    """Hits on the first `share` of the images, moved by `offset`."""
    return np.roll(np.arange(IMAGES) < round(share * IMAGES), offset)


def summary(runs, hits, default="simclr"):
    return summarize(runs, hits, default_head=default, probes=["knn", "linear"])


def hits_of(before, after):
    return {("pre_projection", "linear"): before, ("projection", "linear"): after}


def test_head_and_layer_are_chosen_on_held_out_train_not_on_test():
    runs = [
        run("simclr", 0, pre_projection=0.7, projection=0.9),
        run("other", 0, pre_projection=0.8, projection=0.2),
    ]
    hits = {
        ("simclr", 0): hits_of(made(0.99), made(0.5)),
        ("other", 0): hits_of(made(0.95), made(0.95)),
    }
    found = summary(runs, hits)
    assert (found["best"]["head"], found["best"]["tap"]) == ("simclr", "projection")
    assert found["best"]["accuracy"] == pytest.approx(0.5)
    assert found["gain"] is None
    assert [h["head"] for h in found["heads"]] == ["simclr", "other"]


def test_means_go_over_seeds_and_intervals_match_the_normal_approximation():
    runs = [run("simclr", s, pre_projection=0.8, projection=0.1) for s in (0, 1)]
    hits = {("simclr", s): hits_of(made(0.8, 50 * s), made(0.3, 50 * s)) for s in (0, 1)}
    best = summary(runs, hits)["best"]
    assert best["accuracy"] == pytest.approx(0.8)
    per_image = np.mean([made(0.8), made(0.8, 50)], axis=0)
    # Resampling two seeds gives twice the same one half of the time: a little wider than this.
    expected = 1.96 * per_image.std() / np.sqrt(IMAGES)
    assert expected < best["high"] - best["accuracy"] < 1.6 * expected


def test_gain_is_paired():
    """The same images are hard for both, so the difference is far surer than either accuracy."""
    runs = [run("simclr", 0, pre_projection=0.5), run("new", 0, pre_projection=0.6)]
    hits = {
        ("simclr", 0): {("pre_projection", "linear"): made(0.50)},
        ("new", 0): {("pre_projection", "linear"): made(0.55)},
    }
    gain = summary(runs, hits)["gain"]
    assert gain["over"] == "simclr"
    assert gain["mean"] == pytest.approx(0.05)
    assert 0.02 < gain["low"] < 0.05 < gain["high"] < 0.08
    unpaired = 1.96 * np.sqrt(2 * 0.25 / IMAGES)
    assert gain["high"] - gain["mean"] < unpaired / 2


def test_gap_is_pre_projection_minus_projection():
    runs = [run("simclr", 0, pre_projection=0.9, projection=0.4)]
    gap = summary(runs, {("simclr", 0): hits_of(made(0.9), made(0.4))})["heads"][0]["gap"]
    assert gap["mean"] == pytest.approx(0.5)
    assert gap["low"] < 0.5 < gap["high"]


def test_gain_without_a_shared_seed_pairs_test_images_alone():
    runs = [run("simclr", 1, pre_projection=0.5), run("new", 0, pre_projection=0.6)]
    hits = {
        ("simclr", 1): {("pre_projection", "linear"): made(0.5)},
        ("new", 0): {("pre_projection", "linear"): made(0.6)},
    }
    gain = summary(runs, hits)["gain"]
    assert gain["mean"] == pytest.approx(0.1)
    assert gain["method"] == "paired bootstrap over test images"
    assert summary(runs[1:], {("new", 0): hits["new", 0]})["default_head"] == "simclr"


def test_nothing_finished_gives_no_winner():
    assert summary([], {})["best"] is None


def test_rows_have_the_numbers_of_the_summary_for_every_head_and_tap():
    """Where both heads are best before the head, the row there is the verdict."""
    hits = {
        (head, s): hits_of(made(share + s / 50), made(0.3, 40 * s))
        for head, share in (("simclr", 0.7), ("other", 0.8))
        for s in (0, 1)
    }
    hits["other", 0]["inner", "linear"] = hits["other", 1]["inner", "linear"] = made(0.6)
    runs = [run(h, s, pre_projection=0.9 if h == "other" else 0.8, projection=0.1) for h, s in hits]
    verdict = summary(runs, hits)
    rows = {(row["head"], row["tap"]): row for row in summary_rows(hits, "simclr")}
    assert len(rows) == 5
    row = rows["other", "pre_projection"]
    assert {k: row[k] for k in ("accuracy", "low", "high")} == {
        k: verdict["best"][k] for k in ("accuracy", "low", "high")
    }
    assert [row[k] for k in ("gain", "gain_low", "gain_high")] == [
        verdict["gain"][k] for k in ("mean", "low", "high")
    ]
    assert row["gain"] == pytest.approx(0.1, abs=1e-3)
    assert rows["simclr", "projection"]["gain"] is None  # the default itself
    assert rows["other", "inner"]["gain"] is None  # the default has no such layer
    assert rows["other", "projection"]["gain"] == 0
