"""The repository as a reader meets it: what lies where, who imports whom, and that the README's commands are real."""
import ast
import fnmatch
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import iuvit
import miniature
import sample
import train
import worth
from conftest import ROOT

BACKBONES = dict(unet="UNet", uvit="UViT", iuvit="IUViT", ascend="ASCEND")
TOP_LEVEL = {"README.md", "LICENSE", "requirements.txt", "unet.py", "uvit.py", "iuvit.py", "ascend.py", "diffusion.py",
             "train.py", "sample.py", "data.py", "tests", "assets"}


def isolated(*args, cwd):
    """Output of `python args...` in a folder, with nothing of this repository in reach; the exit code is checked."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}       # -I hides --user installs
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- files -------------------------------------------------------------------------------------------

def test_the_top_level_holds_what_was_agreed_and_nothing_else():
    there = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    if shutil.which("git") and (ROOT / ".git").exists():                # of its files, and not of what its user has made
        listed = ["git", "-c", "safe.directory=*", "ls-files"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        found = {path.split("/")[0] for path in files if not path.startswith(".")}
    else:
        ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
        found = {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert found == TOP_LEVEL and TOP_LEVEL <= there


def test_six_packages_are_required():
    names = re.findall(r"^[a-z]+", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert sorted(names) == ["einops", "numpy", "pillow", "pytest", "torch", "tqdm"]


KNOWS = {**{name: {"math", "torch", "einops"} for name in BACKBONES},
         "diffusion": {*sys.stdlib_module_names, "torch"},
         "data": {*sys.stdlib_module_names, "torch", "numpy", "PIL", "tqdm", "lmdb", "transformers"},      # extras
         "sample": {*sys.stdlib_module_names, "torch", "numpy", "PIL", "tqdm", "data", "diffusion", *BACKBONES}}
KNOWS["train"] = KNOWS["sample"] | {"sample"}           # for --init-from, which reads whatever sample.py draws from


@pytest.mark.parametrize("name", KNOWS)
def test_a_file_imports_only_what_it_may_know(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0] if node.level == 0 else "a relative import")
    assert imported and imported <= KNOWS[name], f"{name}.py may not import {imported - KNOWS[name]}"


# ---- backbones ---------------------------------------------------------------------------------------

def definitions():
    """{name of a top-level function or class: {file: its source}}, over the four backbones."""
    found = {}
    for file in BACKBONES:
        source = (ROOT / f"{file}.py").read_text()
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.setdefault(node.name, {})[file] = ast.get_source_segment(source, node)
    return found


SHARED = {name: bodies for name, bodies in definitions().items() if len(bodies) > 1}


@pytest.mark.parametrize("name", SHARED)
def test_the_same_name_means_the_same_source(name):
    assert len(set(SHARED[name].values())) == 1, f"{name} differs between {', '.join(SHARED[name])}"


def test_all_four_share_their_time():
    assert list(SHARED["timestep_embedding"]) == list(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_runs_alone_in_an_empty_folder(name, tmp_path):
    (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    with torch.device("meta"):
        parameters = sum(p.numel() for p in train.MODELS[name]().parameters())
    *trace, last = isolated(f"{name}.py", cwd=tmp_path).splitlines()
    assert last == f"{parameters:,} parameters"
    assert any("(1, 3, 32, 32)" in line for line in trace), "no line of the trace shows the output's shape"


def test_all_backbones_are_called_alike():
    forwards = {name: str(inspect.signature(model.forward)) for name, model in train.MODELS.items()}
    assert list(forwards) == list(BACKBONES) and len(set(forwards.values())) == 1, forwards
    for model in train.MODELS.values():
        defaults = {name: p.default for name, p in inspect.signature(model).parameters.items()}
        assert (defaults["img_size"], defaults["channels"], defaults["num_classes"]) == (32, 3, 0)


@pytest.mark.parametrize("name", ["train", "sample"])
def test_importing_a_script_runs_nothing(name, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    out = isolated("-c", code, "--no-such-flag", cwd=tmp_path)
    assert out == "" and not list(tmp_path.iterdir())


# ---- presets -----------------------------------------------------------------------------------------

PARAMETERS = {
    "unet-shapes": 762_691, "uvit-shapes": 854_820, "iuvit-shapes": 906_501, "ascend-shapes": 874_291,
    "unet-shapes-text": 866_787, "iuvit-shapes-text": 1_198_149, "ascend-shapes-text": 978_387,
    "unet-emoji64": 4_663_811, "uvit-emoji64": 7_803_012, "iuvit-emoji64": 10_464_179, "ascend-emoji64": 5_148_081,
    "unet-cifar10": 42_855_427, "unet-celeba64": 82_837_635,
    "unet-church256": 118_795_011, "unet-bedroom256": 118_795_011,
    "unet-bedroom256-adm": 552_807_171,         # published 552,814,086, minus the 6,915 of the variance channels
    "unet-imagenet64": 295_900_035,             # published 295,904,454, minus 5,187 of them, plus 768, the null class
    "unet-cc12m64": 299_875_587,
    "uvit-cifar10": 44_255_328, "uvit-celeba64": 44_292_228,            # as published
    "uvit-imagenet64": 130_941_060,             # published 130,940,292, plus 768, the null class
    "uvit-imagenet64-large": 286_828_676,       # published 286,827,652, plus 1,024
    "iuvit-cifar10": 45_150_595, "iuvit-celeba64": 45_166_435, "iuvit-church128": 442_337_877,
    "iuvit-church256": 527_081_637, "iuvit-church256-wide": 935_559_387, "iuvit-church256-p8": 527_377_035,
    "iuvit-cc12m64": 307_715_779, "iuvit-laion128": 580_645_717,
    "ascend-cifar10": 48_038_075, "ascend-celeba64": 48_040_891, "ascend-cub64": 48_040_891, "ascend-cub128": 60_981_451,
    "ascend-bedroom256": 144_914_547, "ascend-celebahq256": 144_914_547, "ascend-laion128": 593_476_755,
}


PAPER = {               # millions of parameters, and how near ours come
    "iuvit-cifar10": (45.15, 0.003), "iuvit-church128": (442.3, 0.003), "iuvit-church256": (527.1, 0.003),
    "iuvit-church256-wide": (935.6, 0.003), "iuvit-church256-p8": (527.1, 0.003), "iuvit-cc12m64": (307.7, 0.005),
    "ascend-laion128": (590, 0.01), "unet-cc12m64": (300, 0.03)}


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_preset_fits_eight_processes_its_network_its_name_and_the_paper(name):
    cfg, _, _ = train.parse(["--preset", name])
    assert cfg.batch % 8 == 0, f"a batch of {cfg.batch} does not divide among eight processes"
    assert re.fullmatch(rf"{cfg.model}-{cfg.data}(-[a-z0-9]+)*", name)
    with torch.device("meta"):
        net = sample.build(vars(cfg), data.describe(cfg.data, cfg.data_dir))
    parameters = sum(p.numel() for p in net.parameters())
    millions, tolerance = PAPER.get(name, (parameters / 1e6, 0))
    assert parameters == PARAMETERS[name] and parameters / 1e6 == pytest.approx(millions, rel=tolerance)
    assert PAPER.keys() <= train.PRESETS.keys()


# ---- the README --------------------------------------------------------------------------------------

def readme_blocks():
    """(language, text) of each fenced block."""
    readme = ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def readme_commands():
    """Every `python ...` and `torchrun ...` as its words; comments are dropped and `a && b` is two commands."""
    commands = []
    for line in "\n".join(text for _, text in readme_blocks()).replace("\\\n", " ").splitlines():
        if re.search(r"\b(python3?|torchrun) ", line.split("#")[0]):
            words = shlex.shlex(line, posix=True, punctuation_chars="&;|")
            words.whitespace_split = True
            command = [[]]
            for word in words:
                command.append([]) if word in ("&&", ";", "|") else command[-1].append(word)
            commands += command
    return [words for words in commands if words and re.search(r"(^|/)(python3?|torchrun)$", words[0])]


COMMANDS = readme_commands()


@pytest.fixture
def prepared_sets(monkeypatch):
    """Sets of your own, of which the README says how to prepare them, count as prepared; published weights as there."""
    own = {words[3] for words in COMMANDS if words[1:3] == ["data.py", "prepare"]} - set(data.BUILT_IN)
    describe, cats_and_dogs = data.describe, dict(size=64, classes=["cat", "dog"], flip=True)
    monkeypatch.setattr(data, "describe", lambda name, folder: cats_and_dogs if name in own else describe(name, folder))
    celeba64 = dict(model="uvit", net={}, cond="none", schedule="linear", prediction="eps", clock="uvit",
                    info=dict(size=64, classes=[], flip=True))
    monkeypatch.setattr(sample, "read", lambda path, weights="ema": (celeba64, {}))


def test_the_readme_shows_how_it_is_used():
    assert len(COMMANDS) >= 8, f"found only {COMMANDS}"
    assert {"train.py", "sample.py", "data.py"} <= {words[1] for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_parses(words, prepared_sets):
    launch = ("--nproc_per_node=", "--nnodes=", "--rdzv_", "--max-restarts=")
    words = [word for word in words[1:] if not word.startswith(launch) and word != "--"]
    if words[0] == "-m":
        assert words[1] in ("pytest", "venv"), f"python -m {words[1]}?"
        return
    script, *flags = words
    assert (ROOT / script).is_file(), f"there is no {script}"
    parsers = {"train.py": train.parse, "sample.py": sample.parse, "data.py": data.parse}
    if script in parsers:
        parsers[script](flags)


@pytest.mark.parametrize("text", [text for language, text in readme_blocks() if language == "python"])
def test_every_python_block_of_the_readme_compiles(text):
    compile(text, "README.md", "exec")


def test_what_the_readme_says_of_copied_files_runs(tmp_path):
    blocks = [text for language, text in readme_blocks() if language == "python"]
    train_step = next(i for i, text in enumerate(blocks) if "from iuvit import IUViT" in text)
    for name in ("iuvit", "diffusion"):
        (tmp_path / f"{name}.py").write_text((ROOT / f"{name}.py").read_text())
    small = "import functools, iuvit; iuvit.IUViT = functools.partial(iuvit.IUViT, dim=32, depth=3, heads=2)"
    seen = "assert torch.allclose(alpha.flatten(), diffusion.Linear().alpha(t)) and loss > 0; print(*x.shape)"
    text = "assert loss > 0; print(*denoise(x0, 0.5).shape)"
    net = dict(dim=32, depth=5, heads=4)
    weights = iuvit.IUViT(num_classes=2, **net).state_dict()
    config = dict(cond="class", net=net, info=dict(size=32, classes=["cat", "dog"]), schedule="cosine", prediction="v")
    torch.save(dict(config=config, ema=weights), tmp_path / "ckpt.pt")
    same = "print(all(p.equal(ckpt['ema'][name]) for name, p in net.state_dict().items()), len(net.in_blocks))"
    kept = "print(type(schedule).__name__, prediction)"
    first, second, third, fourth = blocks[train_step:train_step + 4]
    start = ["import sys; sys.path.insert(0, '.')", small]
    code = "\n".join([*start, first, second, seen, third, text, fourth, same, kept])
    assert isolated("-c", code, cwd=tmp_path) == "4 3 32 32\n8 3 32 32\nTrue 2\nCosine v\n"


def test_every_file_the_readme_shows_exists():
    shown = re.findall(r"\]\(((?!http|#)[^)]+)\)", (ROOT / "README.md").read_text())           # pictures and links
    assert not (missing := [path for path in shown if not (ROOT / path).exists()]), missing


# ---- the experiments ---------------------------------------------------------------------------------

def test_every_run_of_the_miniature_can_be_trained_and_has_its_place_in_the_readme():
    for run in miniature.RUNS:
        argv, facts = miniature.command(run, seed=0)
        assert train.parse(argv)[0].steps == facts["steps"] > 100, run
    shown = {run for _, rows in miniature.EXPERIMENTS.values() for run in rows.values()}
    assert shown == set(miniature.RUNS)
    for flags in [flags for rows in miniature.SAMPLING.values() for flags in rows.values()]:
        sample.parse(list(map(str, flags)))
    for name in [*miniature.EXPERIMENTS, *miniature.SAMPLING]:
        assert f"<!-- miniature {name} -->\n" in (ROOT / "README.md").read_text(), name


def test_tables_of_the_miniature_hold_mean_and_spread_of_finished_rows_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "FOLDER", tmp_path)
    for seed in range(3):
        (tmp_path / f"uvit-{seed}").mkdir()
        result = dict(params=3e6, steps=500, minutes=2, loss=[0.4, 0.3, 0.2, 0.1 * (seed + 1)],
                      score=dict(both=10 * seed, shape=50, colour=100))
        (tmp_path / f"uvit-{seed}" / "result.json").write_text(json.dumps(result))
    head, rule, *rows = miniature.table("backbones")
    assert [row.split(" | ")[0] for row in rows] == ["| U-ViT"]
    assert "0.2000 ± 0.1000" in rows[0] and "10.0 ± 10.0" in rows[0] and head.count("|") == rows[0].count("|")
    assert miniature.table("text") == []


# ---- what a word is worth ----------------------------------------------------------------------------

def test_a_wrong_class_is_wrong_in_one_thing():
    labels = np.random.default_rng(0).integers(0, 24, 2000)
    wrong = worth.wrong_classes(labels)
    assert (wrong["another colour"] // 4 != labels // 4).all() and (wrong["another colour"] % 4 == labels % 4).all()
    assert (wrong["another shape"] // 4 == labels // 4).all() and (wrong["another shape"] % 4 != labels % 4).all()
    assert len({*zip(labels, wrong["another colour"])}) == 24 * 5
    assert len({*zip(labels, wrong["another shape"])}) == 24 * 3


@pytest.mark.parametrize("objects, keys", [
    (1, {"another size": "size", "another colour": "colour", "another shape": "shape", "another place": "place"}),
    (2, {"sizes exchanged": "size", "opposite relation": "relation", "colours exchanged": "", "shapes exchanged": ""})])
def test_a_wrong_caption_is_wrong_in_one_thing(objects, keys):
    """As the scorer reads the picture. Of two exchanged colours or shapes it cannot say which of the two is wrong."""
    drawn = worth.scenes(60, objects)
    pictures, captions = np.stack([data.paint(grey, things, 64) for grey, things, _ in drawn]), [c for *_, c in drawn]
    assert set(data.score_captions(pictures, captions).values()) == {60, 100.0}
    wrong = worth.wrong_captions(captions)
    assert set(wrong) == set(keys)
    for what, key in keys.items():
        score = data.score_captions(pictures, wrong[what])
        assert score.pop("all") == 0 and score.pop("n") == 60, what
        if key:
            assert score.pop(key) == 0 and set(score.values()) == {100.0}, what


def test_a_word_that_is_not_read_is_worth_exactly_nothing():
    config = dict(data="shapes", cond="class", info=dict(size=32), schedule="cosine", prediction="eps")
    (kind, pictures, right, wrong), = worth.questions(config, 100)

    def reads_colour(x, t, y):
        return (y // 4 / 6)[:, None, None, None].expand(x.shape)

    loss, shape, colour = (worth.mean_loss(reads_colour, config, pictures, asked, (0.2, 0.9))
                           for asked in (right, wrong["another shape"], wrong["another colour"]))
    assert loss == shape != colour
