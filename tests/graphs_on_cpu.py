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
    """Let sdpa with its block-diagonal mask stand in for "varlen", of which a CPU has no kernel."""
    transformers.AttentionInterface.register("varlen", transformers.integrations.sdpa_attention.sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("varlen", transformers.masking_utils.sdpa_mask)


def main() -> None:
    from launch import NOTEBOOK, defaults, load_notebook_node, parse, run_cells

    measure, cast = qlora.measure_plan, qlora.adapter_to_fp32

    def cast_apart(model):
        """The second process begins with other weights, which must not last."""
        cast(model)
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.data += 0.01 * qlora.processes()[0]

    def with_graphs(settings, model, examples, lengths, about):
        found = measure(settings, model, examples, lengths, about)
        return found | {"cut": vars(qlora.Cut(4, True, "varlen", graphs=max(lengths)))}

    register_attention()
    qlora.record_graph, qlora.measure_plan, qlora.adapter_to_fp32 = record, with_graphs, cast_apart
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run_cells(parse(sys.argv[1:], defaults(load_notebook_node(str(NOTEBOOK)))))


if __name__ == "__main__":
    main()
