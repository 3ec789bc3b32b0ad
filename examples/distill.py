"""Turns a diffusers pipeline into a GSPN-2 pipeline: distils its self-attention into line scans.

    accelerate launch examples/distill.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES \
        --output_dir outputs/my-adapter --layerwise_steps 1000 --max_train_steps 10000

The teacher is the same model with its own attention, from the same weights. `docs/training.md` tells the rest.
"""

from gspn2_diffusion.loading import ending_in_a_sentence
from gspn2_diffusion.training import parse_args, train


def main() -> None:
    with ending_in_a_sentence():
        train(parse_args())


if __name__ == "__main__":
    main()
