"""Every file of variants/ is proven without a line written for it; and those that are wrong, each
in its own way, are found out."""

import json

import pytest

from nanoswitch import prove, registry

CHOICES = [choice for name in registry.variants() for choice in prove.choices(name)]
pytestmark = pytest.mark.usefixtures("one_thread")


def name_of(choice):
    return "-".join(f"{flag}-{name}" for flag, name in choice.items())


def together():
    """Choices of several variants at once, a switch each, which hold every variant."""
    ways = {}
    for choice in CHOICES:
        if len(choice) == 1:
            ((flag, name),) = choice.items()
            ways.setdefault(flag, []).append(name)
    most = max(map(len, ways.values()))
    return [{flag: names[i % len(names)] for flag, names in ways.items()} for i in range(most)]


@pytest.mark.parametrize("choice", CHOICES, ids=name_of)
def test_a_variant_holds_what_every_switch_does(choice):
    made = prove.configs(choice, {})
    prove.causal(choice, [*made[:2], *made[-3:]])
    prove.counted(choice, made)
    prove.saved(choice, made)


@pytest.mark.parametrize("choice", together(), ids=name_of)
def test_variants_of_several_switches_go_together(choice):
    made = prove.configs(choice, {})
    prove.documents(choice, made)
    prove.windows(choice, made)
    some = [config for config in made if config.window or config.n_kv_head == 2][:2] or made[:2]
    prove.cached(choice, some)
    prove.dtypes(choice, some[:1])
    prove.compiled(choice, some[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.variants())
def test_all_that_the_command_proves(name, capsys):
    """With every kernel and encoding, on two ranks under each mode, on two cards that are faked."""
    assert prove.holds(prove.prove(name)), capsys.readouterr().out


@pytest.mark.slow
def test_experts_are_balanced_by_the_loads_of_all_ranks():
    """A rate at which a step by one rank's own loads would end elsewhere."""
    assert prove.on_ranks([{"mlp": "moe", "settings": "moe.rate=0.1"}]) == [""]


# ----------------------------------------------------------------------------- what is wrong

WRONG = {
    "causal": """
class Wrong(Attention):  # reads the token after
    def output(self, y, x, carry):
        return y + torch.roll(y, -1, 1)
""",
    "documents": """
class Wrong(Attention):  # the mask forgets the documents
    def mask(self, pos, wpe, docs=None, cache=None):
        return super().mask(pos, wpe, None, cache)
""",
    "windows": """
class Wrong(Attention):  # the mask forgets the window
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.window = 0
""",
    "cached": """
class Wrong(Attention):  # reads the token before, which a cache does not hold
    def output(self, y, x, carry):
        return y + F.pad(y, (0, 0, 1, 0))[:, :-1]
""",
    "dtypes": """
class Wrong(Attention):  # fp32 where the products are in bf16
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.matrix = nn.Parameter(torch.zeros(config.n_embd, config.n_embd))

    def output(self, y, x, carry):
        with torch.autocast(y.device.type, enabled=False):
            return y @ self.matrix
""",
    "counted": """
class Wrong(Attention):  # multiplies twice what it holds once
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.more = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def output(self, y, x, carry):
        return y + self.more(self.more(x))
""",
    "saved": """
class Wrong(Attention):  # draws numbers that no checkpoint holds
    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.numbers = torch.rand(config.n_embd)

    def output(self, y, x, carry):
        return y * self.numbers.to(y.device)
""",
    "compiled": """
class Wrong(Attention):  # asks the numbers, which a compiler does not know
    def output(self, y, x, carry):
        return y * 2 if y.sum().item() > 0 else y
""",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_variant_is_found_out(what, variant_file):
    variant_file(f"wrong_{what}", WRONG[what])
    choice = {"attention": f"wrong_{what}"}
    made = prove.configs(choice, {})
    held, text = prove.attempt(getattr(prove, what), choice, made)
    assert not held, text


def test_a_variant_may_say_that_no_cache_holds_what_it_reads(variant_file):
    variant_file("no_cache", WRONG["cached"].replace("    def", "    caches = False\n\n    def", 1))
    choice = {"attention": "no_cache"}
    made = [config for config in prove.configs(choice, {}) if not config.document_mask][:3]
    held, text = prove.attempt(prove.cached, choice, made)
    assert held and "no cache" in text, text


def test_a_card_shows_each_check_and_ends_with_status_1_where_one_fails(
    variant_file, capsys, monkeypatch, tmp_path
):
    variant_file("leaky", WRONG["causal"])
    monkeypatch.setattr(prove, "CHECKS", [prove.causal, prove.counted])
    argv = ["prove", "leaky", "--quick", "true", "--out", str(tmp_path / "cards")]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match="1"):
        prove.main()
    out = capsys.readouterr().out
    assert "causal     FAILED" in out and "its future" in out
    assert "counted    ok" in out and "| parameters |" in out
    (proof,) = json.loads((tmp_path / "cards/leaky.json").read_text())["proofs"]
    assert proof["choice"] == {"attention": "leaky"} and proof["speed"] is None
    assert [one["holds"] for one in proof["checks"].values()] == [False, True]
    assert "its future" in proof["checks"]["causal"]["says"]
    without, with_it = proof["costs"]["parameters"]
    assert f"| parameters | {without:,} | {with_it:,} | +0.0% |" in out
