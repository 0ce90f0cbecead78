"""`python -m agrpo_megatron` and `torchrun -m agrpo_megatron`: the `agrpo` command."""

from agrpo_megatron.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
