"""Plans: what is read, and one line for each that cannot be meant."""

import hashlib

import pytest
from helpers.study_plans import small_plan, write_plan
from helpers.trees import ROOT

import models
from utils.study.plan import VARIANTS, arch_and_flags, read_plan
from utils.system.errors import UserError


def test_a_plan_and_its_comparisons(tmp_path):
    plan = small_plan(tmp_path)
    assert plan.networks["mobilenetv2"].rates == (0.01, 0.05)
    assert plan.pairs == [("SE", "none"), ("ECA k=3", "none"), ("ECA k=3", "SE")]
    data = (tmp_path / "plan.json").read_bytes()
    assert plan.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": ...}, r"wrong: \['level'\]"),
        ({"epochs": 3}, r"wrong: \['epochs'\]"),
        ({"level": 1.0}, "level 1.0"),
        ({"variants": ["none", "ECA k=4"]}, "no variant 'ECA k=4'; did you mean ECA k=3"),
        ({"variants": ["SE", "none"], "also_compare": []}, "variants begin with 'none'"),
        ({"variants": ["none"], "also_compare": []}, "at least one other"),
        ({"also_compare": [["ECA adaptive", "none"]]}, "pairs of the plan's variants"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [True]}, "whole numbers"),
        ({"validation_per_class": 0}, "empty"),
        ({"networks": {"eca_resnet18": {"rates": [0.1], "flags": []}}}, "give a plain one"),
        ({"networks": {"resnet18": {"rates": [], "flags": []}}}, "rates is"),
        ({"networks": {"resnet18": {"rates": [0.1], "flags": ["--lr=1"]}}}, "itself gives --lr=1"),
        ({"train_per_class": "all"}, "train_per_class is 'all'"),
    ],
)
def test_what_is_no_plan(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        read_plan(write_plan(tmp_path / "plan.json", **changes))


def test_no_file_and_no_json(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match=r"bad\.json: no JSON"):
        read_plan(tmp_path / "bad.json")


def test_the_plans_of_the_repository_are_plans():
    files = sorted((ROOT / "tools" / "study_plans").glob("*.json"))
    assert {file.stem for file in files} >= {"smoke", "fashion"}
    for file in files:
        read_plan(file)


@pytest.mark.parametrize("network", ["resnet18", "mobilenetv2"])
def test_every_variant_is_a_network_of_its_own(network):
    found = []
    for variant in VARIANTS:
        arch, flags = arch_and_flags(network, variant)
        words = [word for word in flags if word != "--identity-start"]
        given = {k.strip("-"): v for k, v in zip(words[::2], words[1::2], strict=True)}
        built = models.create_model(arch, num_classes=2, **given)
        found.append((built.attention, built.ksize, len(flags) - len(words)))
    assert [attention for attention, *_ in found] == ["none", "se", "eca_ns", *["eca"] * 4]
    assert set(found[2][1]) == set(found[3][1]) == {3}
    assert len(set(found)) == len(VARIANTS)
