"""`launch.py` with a plan of CUDA graphs but no GPU, for tests: recordings are functions that do the same work again.

    python -m torch.distributed.run --nproc_per_node 2 tests/graphs_on_cpu.py BASE_MODEL=… DATA=…

It works from the places and into the result of the first time, as a graph does. All around it is the real thing.
"""

import os
import sys

import torch
import transformers
from run_notebook import qlora


def record(work, pool):
    result = torch.zeros(())
    return lambda: result.copy_(work()), result, "pool"


def register_attention() -> None:
    """ "varlen", of which a CPU has no kernel, is sdpa with its block-diagonal mask."""
    transformers.AttentionInterface.register("varlen", transformers.integrations.sdpa_attention.sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("varlen", transformers.masking_utils.sdpa_mask)


def main() -> None:
    from launch import NOTEBOOK, defaults, load_notebook_node, parse, run_cells

    measure = qlora.measure_plan

    def with_graphs(settings, model, examples, lengths, about):
        found = measure(settings, model, examples, lengths, about)
        return found | {"cut": vars(qlora.Cut(4, True, "varlen", graphs=max(lengths)))}

    register_attention()
    qlora.record_graph, qlora.measure_plan = record, with_graphs
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run_cells(parse(sys.argv[1:], defaults(load_notebook_node(str(NOTEBOOK)))))


if __name__ == "__main__":
    main()
