"""Collect what the card of an export tells about a run: settings, figures, and where its data comes from."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from smollm_jax import __version__
from smollm_jax.checkpoint.listing import VerifiedCheckpoint
from smollm_jax.config.recipes import RECIPES
from smollm_jax.config.settings import Config
from smollm_jax.data.sources import looks_local, mixture
from smollm_jax.hf.card import REPO, About, DataUse
from smollm_jax.runs.load import parent_of, progress_of, read_run
from smollm_jax.runs.metrics import duration
from smollm_jax.runs.records import evaluations, last_sample, read_metrics, scores_in

LONGEST_WORD = 100  # of a revision or licence: a dataset's card may say anything


def about_run(run_dir: Path, found: VerifiedCheckpoint, *, ema: bool = False) -> About:
    """Return what the card of an export tells about a run at a checkpoint, or about its moving average."""
    config, progress = read_run(run_dir), progress_of(found)[0] if "progress" in found.meta else {}
    lines = [line for line in read_metrics(run_dir) if line["step"] <= found.step]
    held_out, computed = (evaluations(lines) or [{}])[-1], found.meta.get("computed", {})
    of = "eval_ema_" if ema else "eval_"
    speeds = sorted(x["tokens_per_second"] for x in lines if x.get("tokens_per_second")) or [None]
    sources = [spec.partition(":")[0] for spec, _ in mixture(config.data.data) if not looks_local(spec)]
    optimizer, places = config.optimizer, ("device", "platform", "dtype")
    preference, is_pairs = config.preference, config.data.is_pairs
    smoothed = f", label smoothing {preference.label_smoothing:g}" if preference.label_smoothing else ""
    parent = parent_of(run_dir)
    since = f" since step {parent['step']:,}" if parent else ""
    began = config.run.init_from or found.meta.get("imported_from")
    scores = {} if ema else _scores(lines, found.step)
    rows = {
        "Recipe": config.recipe,
        "Data": config.data.data,
        "Steps": found.step,
        "Tokens": progress.get("tokens"),
        "Batch (sequences)": config.main_batch_size,
        "Sequence length": config.data.seq_len,
        "Loss on": config.data.loss_on if config.data.data_kind == "chat" else None,
        "Pair loss": f"{preference.pair_loss}, beta {preference.beta:g}{smoothed}" if is_pairs else None,
        "Optimizer": optimizer.description,
        "Peak learning rate": config.learning_rate,
        "Weights": f"moving average, decay {optimizer.ema:g}" if ema else None,
        "Weight of the z-loss": optimizer.z_loss or None,
        "Schedule": f"{optimizer.schedule_name}, {config.warmup_steps:,} steps of warm-up",
        "Weight decay": optimizer.weight_decay,
        "Gradient norm clipped at": optimizer.clip_norm,
        "Seed": config.run.seed,
        "Began with": began,
        "Annealed from": parent and f"{Path(parent['parent']).name}, step {parent['step']:,}",
        f"Held-out loss ({'a pair' if is_pairs else 'nats per token'})": held_out.get(f"{of}loss"),
        "Held-out accuracy (chosen above rejected)": None if ema else held_out.get("eval_rewards/accuracies"),
        f"Held-out bits per byte{' of the chosen answers' * is_pairs}": held_out.get(f"{of}bits_per_byte"),
        **{f"Score {name}": words for name, (_, words) in scores.items()},
        "Computed on": ", ".join(str(computed[x]) for x in places if x in computed) or None,
        "Devices": computed.get("devices"),
        "Tokens per second": speeds[len(speeds) // 2] and round(speeds[len(speeds) // 2]),
        "Time": progress.get("elapsed_seconds") and duration(progress["elapsed_seconds"]),
        "Versions": f"smollm-jax {__version__}, jax {version('jax')}, flax {version('flax')}",
    }
    prompt, sample = ("", "") if ema else last_sample(run_dir, found.step)
    return About(
        title=(run_dir if run_dir.name != "." else run_dir.resolve()).name,
        rows=rows if progress else {x: y for x, y in rows.items() if x == "Began with" or x.startswith("Score ")},
        uses=_uses(found, config),
        # a branch counts its own data, and a buffer only conversations which have left it
        uses_title=f"Trained on{since}{', at least' * config.data.is_chat}",
        scores={name: score for name, (score, _) in scores.items()},
        datasets=tuple(name for name in sources if REPO.fullmatch(name)),
        language=_language(config),
        base_model=began if began and REPO.fullmatch(began) and not Path(began).exists() else None,
        prompt=prompt or (config.run.sample_prompts or ("Once upon a time",))[0],
        sample=sample,
        chat=config.data.is_chat,
        pairs=is_pairs,
    )


def _language(config: Config) -> str | None:
    """Return the language of the data if it is known: the recipes' data is English."""
    english = {spec for recipe in RECIPES.values() for spec, _ in mixture(recipe.data.data)}
    return "en" if english.issuperset(spec for spec, _ in mixture(config.data.data)) else None


def _scores(lines: list[dict[str, Any]], step: int) -> dict[str, tuple[float, str]]:
    """Return the scores on tasks of the checkpoint at `step`, the newest of each, also as text."""
    found = {name: (score, x) for x in lines if x["step"] == step for name, score in scores_in(x).items()}
    errors = {name: f" ± {error:.4f}" for name, (error, _) in found.items()}
    told = {}
    for name, (score, line) in found.items():
        if not name.endswith("_stderr"):
            limit, shots = line.get("task_limit"), line.get("task_shots")
            about = ([f"{limit:,} documents"] if limit else []) + ([f"{shots}-shot"] if shots is not None else [])
            told[name] = score, f"{score:.4f}{errors.get(f'{name}_stderr', '')}{_in_brackets(about)}"
    return told


def _in_brackets(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _uses(found: VerifiedCheckpoint, config: Config) -> tuple[DataUse, ...]:
    """Return what the run has trained on, of each source, by the cursor of a checkpoint. Nothing if it is damaged.

    The documents that the cursor counts are read to their end. A document read in two epochs counts twice.
    """
    names = [spec for spec, _ in mixture(config.data.data)]
    try:
        states = [shard["sources"] for shard in found.meta["cursor"]["lanes"].values()]
        origins = found.meta.get("sources") or [{}] * len(names)
        uses = []
        for name, origin, parts in zip(names, origins, zip(*states, strict=True), strict=True):
            documents = sum(part["documents"] for part in parts) if all("documents" in x for x in parts) else None
            told = (str(origin[x])[:LONGEST_WORD] if origin.get(x) else None for x in ("revision", "license"))
            uses.append(DataUse(name, documents, sum(int(part["tokens"]) for part in parts), *told))
        return tuple(uses)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return ()
