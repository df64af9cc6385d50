"""Phase 1's sweep on a real base: SmolLM2-135M, GSM8K's own text, D' = 64 ... 512; at most 15 minutes on two cores.

    python benchmarks/compressor_sweep.py [--texts 400] [--epochs 1] [--start pca] [--precision bf16] [--record]

Every width is trained in the same passes over the text. Beside each one's figures on held-out text stands PCA's, fitted
on the same training text, and what the mean vector alone reaches. From PCA (the default) there is nothing left to gain;
`--start random` shows how far gradient descent comes by itself.
"""

import time

from _record import benchmark_options, record
from _smollm2 import CHECKOUT, real_gsm8k, smollm2_folder

from smollm_trm.phases.compressor import describe_report, pretrain_compressor
from smollm_trm.phases.settings import CompressorRunSettings

WIDTHS = [64, 128, 256, 512]


def main() -> None:
    """Run the sweep and print its table."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--texts", type=int, default=400, help="GSM8K problems with their solutions")
    parser.add_argument("--epochs", type=int, default=1, help="passes of gradient descent")
    parser.add_argument("--start", default="pca", choices=("pca", "random"))
    parser.add_argument("--precision", default="bf16", help="of the base's weights")
    options = parser.parse_args()
    data = real_gsm8k()
    settings = CompressorRunSettings(
        model_name=str(smollm2_folder()), data="gsm8k", data_dir=data and str(data), d_compressed=256,
        sweep=[width for width in WIDTHS if width != 256], num_samples=options.texts, num_epochs=options.epochs,
        start=options.start, precision=options.precision, resume="never", progress=False,
        output_dir=str(CHECKOUT / "outputs" / f"compressor_sweep_{options.start}"),
    )  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    report = pretrain_compressor(settings)
    figures = {"minutes": (time.perf_counter() - started) / 60, "cpu_minutes": (time.process_time() - cpu) / 60}
    print(describe_report(report))
    held_out = report["held_out"]
    for width in WIDTHS:
        above = held_out[f"kept {width}"]["mse"] / held_out[f"PCA {width}"]["mse"] - 1
        print(f"D' = {width}: error {100 * above:+.2f}% to PCA's")
    rounded = {name: {key: round(value, 6) for key, value in one.items()} for name, one in held_out.items()}
    figures = {name: round(value, 2) for name, value in figures.items()}
    setup = {"texts": options.texts, "epochs": options.epochs, "start": options.start, "states": report["states"]}
    record("compressor_sweep", {**figures, **setup, "held_out": rounded}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()
