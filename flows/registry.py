"""Every flow by its name."""

from typing import Any

from prefect import Flow

from flows.compare_first_stages import compare_first_stages
from flows.download_shards import download_shards
from flows.encode_latents import encode_latents
from flows.evaluate import evaluate
from flows.evaluate_first_stage import evaluate_first_stage
from flows.reproduce import reproduce
from flows.train_first_stage import train_first_stage
from flows.train_ldm import train_ldm

FLOWS: dict[str, Flow[..., Any]] = {
    flow.name: flow
    for flow in (
        download_shards,
        train_first_stage,
        evaluate_first_stage,
        encode_latents,
        train_ldm,
        evaluate,
        reproduce,
        compare_first_stages,
    )
}
