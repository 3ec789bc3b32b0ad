"""Fine-tunes GSPN-2 layers on captioned images with the plain diffusion loss, no teacher.

    accelerate launch examples/train_text_to_image.py --pretrained_model_name_or_path MODEL --adapter ADAPTER \
        --train_data_dir IMAGES --output_dir outputs/my-adapter --max_train_steps 10000

Without `--adapter` the layers start from the attention they replace, or with `--init random` from scratch.
"""

from gspn2_diffusion.loading import ending_in_a_sentence
from gspn2_diffusion.training import TextToImageArguments, parse_args, train


def main() -> None:
    with ending_in_a_sentence():
        train(parse_args(TextToImageArguments))


if __name__ == "__main__":
    main()
