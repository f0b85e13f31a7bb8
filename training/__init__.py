"""Trains the embedded model "emoji" from nothing but a font: `python -m training.<stage>`.

Stages in order: `scenes`, `tokenizer`, `clip --name a`, `clip --name b`, `aesthetic`, `autoencoder`, `preference`,
`latents`, `texts`, `unet`, `export`, `prompts`, `evaluate`. Each one reads and writes `training/work/`, is seeded, and
continues where it was stopped. `training/README.md` has the commands.
"""
