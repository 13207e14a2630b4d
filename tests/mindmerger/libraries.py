"""Imports of a rank, for the process that ranks are forked from."""

import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
import transformers.modeling_utils  # noqa: F401

import mindmerger.build  # noqa: F401
