"""Hook points: every form that is taken and refused, and the same place in other systems' numbers."""

import pytest

from nemo_qwen_hidden.errors import ConfigError
from nemo_qwen_hidden.hookpoint import EMBED, FINAL_NORM, RESID_POST, SITES, HookPoint, deepest, expand

FORMS = "must be `embed`, `final_norm`, `all`, or a site and layers, as `resid_post@i` or `resid_post@start:stop:step`"
KNOWN = f"must be at one of the sites {', '.join(SITES)}"


def names(specs: str | list[str], num_layers: int) -> list[str]:
    return [str(point) for point in expand(specs, num_layers=num_layers)]


@pytest.mark.parametrize(
    ("specs", "points"),
    [
        ("embed", ["embed"]),
        ("final_norm", ["final_norm"]),
        ("resid_post@0", ["resid_post@0"]),
        ("resid_post@5", ["resid_post@5"]),
        ("resid_post@-1", ["resid_post@5"]),
        ("resid_post@-6", ["resid_post@0"]),
        ("all", [f"resid_post@{layer}" for layer in range(6)]),
        ("resid_post@:", [f"resid_post@{layer}" for layer in range(6)]),
        ("resid_post@0:6:2", ["resid_post@0", "resid_post@2", "resid_post@4"]),
        ("resid_post@::4", ["resid_post@0", "resid_post@4"]),
        ("resid_post@1:3", ["resid_post@1", "resid_post@2"]),
        ("resid_post@-2:", ["resid_post@4", "resid_post@5"]),
        ("resid_post@:-4", ["resid_post@0", "resid_post@1"]),
        ("resid_post@::-3", ["resid_post@2", "resid_post@5"]),
        ("resid_post@4:0:-2", ["resid_post@2", "resid_post@4"]),
        (["final_norm", "resid_post@-2", "embed"], ["embed", "resid_post@4", "final_norm"]),
        (
            ["resid_post@1", "z@1", "q@0:2", "attn_weights@1", "resid_pre@1"],
            ["q@0", "resid_pre@1", "q@1", "attn_weights@1", "z@1", "resid_post@1"],
        ),
        (["resid_post@5", "all", "resid_post@-1"], [f"resid_post@{layer}" for layer in range(6)]),
    ],
)
def test_what_is_asked_for_comes_once_and_in_order_of_depth(specs: str | list[str], points: list[str]) -> None:
    assert names(specs, 6) == points


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("resid_post@6", "must name a layer from 0 to 5 (or -6 to -1)"),
        ("resid_post@-7", "must name a layer from 0 to 5 (or -6 to -1)"),
        ("resid_post", "needs a layer at site `resid_post`, such as `resid_post@5`"),
        ("embed@0", "takes no layer at site `embed`"),
        ("final_norm@5", "takes no layer at site `final_norm`"),
        ("resid_post@0:7", "must stay within the model's 6 layers"),
        ("resid_post@-7:", "must stay within the model's 6 layers"),
        ("resid_post@3:3", "must select at least one of the model's 6 layers"),
        ("resid_post@4:2", "must select at least one of the model's 6 layers"),
        ("resid_post@0:6:0", FORMS),
        ("resid_post@0:6:2:1", FORMS),
        ("resid_post@1-2", FORMS),
        ("resid_post@", FORMS),
        ("resid_post@x", FORMS),
        ("resid_post@1 ", FORMS),
        ("resid_post@1,2", FORMS),
        ("resid_mids@1", KNOWN),
        ("hook_q@1", KNOWN),
        ("Embed", FORMS),
        ("ALL", FORMS),
        ("all@1", KNOWN),
        ("12", FORMS),
        ("", FORMS),
    ],
)
def test_what_is_refused_and_how(spec: str, rule: str) -> None:
    with pytest.raises(ConfigError) as refused:
        expand(["embed", spec], num_layers=6)
    assert (refused.value.setting, refused.value.rule, refused.value.value) == ("capture.hook_points", rule, spec)


def test_nothing_asked_for_is_refused_in_the_caller_s_words() -> None:
    with pytest.raises(ConfigError) as refused:
        expand([], num_layers=6, setting="hook_points")
    assert str(refused.value) == "`hook_points` must name at least one hook point, but is [] instead."


@pytest.mark.parametrize("text", ["embed", "final_norm", "resid_post@0", "resid_post@12"])
def test_parse_reads_what_str_writes(text: str) -> None:
    assert str(HookPoint.parse(text)) == text


def test_parse_gives_site_and_layer() -> None:
    assert HookPoint.parse("resid_post@12") == HookPoint(RESID_POST, 12)
    assert HookPoint.parse("embed") == HookPoint(EMBED)


NO_PLACES = ["resid_post", "resid_post@-1", "resid_post@0:2", "resid_post@²", "embed@0", "resid_pres@1", "embed ", ""]


@pytest.mark.parametrize("text", NO_PLACES)
def test_parse_takes_one_exact_place(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        HookPoint.parse(text)
    assert (refused.value.setting, refused.value.value) == ("hook point", text)


# L = 24 layers, as in Qwen2.5-0.5B: layers to run, index in Hugging Face's hidden_states (24 is normed), normed.
PLACES_OF_24 = [
    ("embed", 0, 0, False),
    ("resid_pre@0", 1, 0, False),
    ("resid_pre@23", 24, 23, False),
    ("resid_mid@3", 4, None, False),
    ("rot_k@3", 4, None, False),
    ("resid_post@0", 1, 1, False),
    ("resid_post@11", 12, 12, False),
    ("resid_post@22", 23, 23, False),
    ("resid_post@23", 24, None, False),
    ("final_norm", 24, 24, True),
]


@pytest.mark.parametrize(("text", "depth", "huggingface", "normed"), PLACES_OF_24)
def test_the_same_place_in_other_systems(text: str, depth: int, huggingface: int | None, normed: bool) -> None:
    point = HookPoint.parse(text)
    assert (point.depth(24), point.huggingface_index(24), point.normed) == (depth, huggingface, normed)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("embed", "token embeddings, the input of decoder layer 0; before the final norm"),
        ("resid_post@3", "residual stream after decoder layer 3 (0-based, of 24); before the final norm"),
        ("final_norm", "output of the final RMSNorm over resid_post@23; after the final norm"),
    ],
)
def test_the_meaning_always_says_before_or_after_the_norm(text: str, meaning: str) -> None:
    assert HookPoint.parse(text).meaning(24) == meaning


@pytest.mark.parametrize(
    ("specs", "layers"),
    [(["embed"], 0), (["embed", "resid_post@2"], 3), (["resid_post@-1"], 6), (["final_norm", "embed"], 6)],
)
def test_no_more_layers_than_the_deepest_point_needs(specs: list[str], layers: int) -> None:
    assert deepest(expand(specs, num_layers=6), 6) == layers


def test_the_state_after_the_last_layer_comes_before_the_normed_one() -> None:
    last, normed = expand(["final_norm", "resid_post@-1"], num_layers=1)
    assert (str(last), normed.site) == ("resid_post@0", FINAL_NORM)
