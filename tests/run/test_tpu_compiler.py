"""Which chips need options of the TPU compiler, and what a run says where they are missing."""

from r1jax.run.tpu_compiler import VARIABLE, compiler_options, unset_flags


def test_the_warning_has_a_value_that_ends_it() -> None:
    given = {VARIABLE: "--xla_tpu_scoped_vmem_limit_kib=1024"}
    warning = unset_flags("TPU7x", given)
    assert warning is not None
    value = warning.partition(f"{VARIABLE}='")[2].rstrip("'")
    assert value.startswith(given[VARIABLE])  # which stays
    assert unset_flags("TPU7x", {VARIABLE: value}) is None


def test_a_value_of_the_user_stays() -> None:
    (name,) = compiler_options("TPU7x")
    assert unset_flags("TPU7x", {VARIABLE: f"--{name}=true"}) is None


def test_other_devices_need_none() -> None:
    for kind in ("cpu", "TPU v5p", "NVIDIA H200"):
        assert compiler_options(kind) == {} and unset_flags(kind, {}) is None
