"""Devices by name and by card."""

from __future__ import annotations

import pytest

from graph_capture.devices import DEVICES, calibrated, device_by_name, device_of_card


def test_a_device_is_found_whatever_the_case() -> None:
    assert device_by_name("H100-80GB") is DEVICES["h100-80gb"]
    assert device_by_name(DEVICES["cpu"]) is DEVICES["cpu"]


def test_an_unknown_name_is_answered_with_the_nearest_and_with_all() -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'a100-80gb'\?.*Known devices: cpu, v100-32gb"):
        device_by_name("a100-8gb")


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA H200", 141, "h200-141gb"),
        ("NVIDIA GeForce RTX 4090", 24, "rtx4090-24gb"),
        ("Tesla T4", 15, "t4-16gb"),
    ],
)
def test_a_card_is_found_by_its_drivers_name(card: str, gib: int, name: str) -> None:
    assert device_of_card(card, gib * 2**30).name == name


def test_an_unknown_card_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="say device="):
        device_of_card("NVIDIA Riva TNT2", 2**25)


def test_every_device_names_its_source_and_has_a_rate_for_every_dtype() -> None:
    for device in DEVICES.values():
        assert device.source
        assert device.peak_flops("bfloat16") >= device.peak_flops("something else") > 0


def test_a_calibrated_device_carries_the_measured_numbers() -> None:
    device = calibrated("mine", 1e12, 1e11, 1e-6)
    assert (device.peak_flops("float32"), device.bytes_per_second, device.launch_seconds) == (1e12, 1e11, 1e-6)
    assert device.random_numbers_per_second == 0
