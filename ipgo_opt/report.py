"""report.html: a run on one self-contained page, made from the run directory alone."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from ipgo_opt.rewards.base import shown

STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
figure { display: inline-block; margin: 0 1.5rem 1rem 0 } figure img { width: 320px; border-radius: 6px }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
td { font-variant-numeric: tabular-nums } svg { width: 100%; height: auto } .note { opacity: .7 }
"""


def curve(history: list[dict[str, Any]]) -> str:
    """An SVG of every reward (dots), the best so far (line) and the raw prompt's (dashes) against images."""
    points = [(record["image"], record["reward"], record["best"]) for record in history if record["reward"] is not None]
    if not points:
        return ""
    width, height, left, bottom = 760, 260, 56, 34
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    last = max(points[-1][0], 1)

    def x(image: float) -> float:
        return left + image / last * (width - left - 12)

    def y(value: float) -> float:
        return 12 + (high - value) / (high - low) * (height - bottom - 12)

    dots = "".join(f'<circle cx="{x(i):.1f}" cy="{y(r):.1f}" r="2.4"/>' for i, r, _ in points)
    best = " ".join(f"{x(i):.1f},{y(b):.1f}" for i, _, b in points)
    raw = y(points[0][1])
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="reward against images" fill="currentColor" '
        f'font-size="12"><g fill="#8888">{dots}</g>'
        f'<polyline points="{best}" fill="none" stroke="#d2571b" stroke-width="2.5"/>'
        f'<line x1="{left}" x2="{width - 12}" y1="{raw:.1f}" y2="{raw:.1f}" stroke="#4a7" stroke-dasharray="6 4"/>'
        f'<text x="2" y="{y(high) + 4:.1f}">{high:.3f}</text><text x="2" y="{y(low) + 4:.1f}">{low:.3f}</text>'
        f'<text x="{left}" y="{height - 6}">0</text><text x="{width - 12}" y="{height - 6}" text-anchor="end">{last} '
        f"images</text></svg>"
        '<p class="note">dots: every image · line: best so far · dashes: raw prompt</p>'
    )


def rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, for the raw prompt and for the optimized tokens."""

    def number(value: float | None) -> str:
        """Four digits, or a dash for what is not known."""
        return "–" if value is None else f"{value:.4f}"

    shared = "validation_prompts" in result
    label = f"reward on {result['validation_prompts']} validation prompts" if shared else "reward on the search seeds"
    out = [(label, number(result["raw_reward"]), number(result["search_reward"]))]
    if not shared and result["seeds"] != list(range(result["seed"], result["seed"] + len(result["seeds"]))):
        out.insert(0, ("raw prompt on the first and on the chosen seed", out[0][1], number(result["seed_reward"])))
    held_out = result["held_out"]
    if held_out:
        label = f"reward on {held_out['n']} fresh seeds (mean ± sd)"
        raw = f"{number(held_out['raw_mean'])} ± {number(held_out['raw_sd'])}"
        out.append((label, raw, f"{number(held_out['mean'])} ± {number(held_out['sd'])}"))
        parts = held_out["parts"]
        names = [name for name in parts if f"raw_{name}" in parts]
        for name in names if len(names) > 1 else ():
            out.append((f"of it, {name}", number(parts[f"raw_{name}"]), number(parts[name])))
    if result["judge"]:
        raw, optimized = f"{result['judge']['raw']:.4f}", f"{result['judge']['optimized']:.4f}"
        out.append(("held-out judge on the same fresh seeds", raw, optimized))
    return out


def report_html(run: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> str:
    """The page of a finished run."""
    result, config = run["result"], run["config"]

    def figure(name: str, caption: str) -> str:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    table = "".join(f"<tr><td>{html.escape(a)}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows(result))
    texts = "".join(
        f"<p>optimized {name.replace('_', ' ')}: <b>{html.escape(text)}</b></p>"
        for name, text in (result.get("optimized") or {}).items()
    )
    settings = "".join(f"<tr><td>{k}</td><td>{html.escape(str(v))}</td></tr>" for k, v in config.items())
    seed = result["seeds"][0]
    same_seed = seed == result["seed"] or "validation_prompts" in result
    chosen = "optimized, same seed" if same_seed else f"optimized, seed {seed}"
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(config["prompt"])}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>{html.escape(config["prompt"])}</h1>
<p>{html.escape(config["model"])} · {config["space"]} × {config["strategy"]} · reward
{html.escape(shown(config["reward"]))} · {result["images"]} images, {result["denoiser_calls"]} denoiser calls,
{result["seconds"]:.0f} s</p>
{figure("raw.png", "raw prompt")}{figure("best.png", chosen)}
{texts}<table><tr><th></th><th>raw</th><th>optimized</th></tr>{table}</table>
{curve(history)}
<details><summary>settings</summary><table>{settings}</table></details>
</html>
"""
