"""Callbacks that work on an unmodified LightningModule."""

from __future__ import annotations

from camtrain.callbacks._alarm_board import replay_alarms
from camtrain.callbacks.attention_monitor import AttentionMonitor
from camtrain.callbacks.exact_resume import ExactResume
from camtrain.callbacks.mask_loss import MaskLossCallback
from camtrain.callbacks.outside_swap import OutsideSwap

__all__ = ["AttentionMonitor", "ExactResume", "MaskLossCallback", "OutsideSwap", "replay_alarms"]
