"""The rooms behind `finetune_mistral.ipynb`: what no library does, each thing in one place.

Each room imports only from those that stand before it here, and from `qlora_helpers`:

machine, files, lock, setup, hub, fields, talks, rows, sources, readers, notes, data, chat,
tokens, lengths, template, audit, batches, answers, scores, base_model, sixteen_bits, base_adapter,
identity, backup, report, arithmetic, compare, speed, access, architecture, folders, preflight,
checkpoints, trials, plan, callbacks, pace, train, modelfile, card, save, merge, export,
command_line, headless, launch
"""

VERSION = "1.0.0"  # the notebook fetches the release of this name
