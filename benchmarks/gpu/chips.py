"""GPUs, and the most that each can compute."""

# Dense bf16 with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets; GeForce cards' are from the white
# papers of their architectures. Newer data sheets print the rate with sparsity, which is twice as much.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,  # SXM
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H20": 148.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX PRO 6000": 503.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 209.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}


def peak_tflops(name: str) -> float | None:
    """Return the peak of a device by the name that CUDA gives it; None if it is not in the table.

    The longest known name whose words the device's name contains counts.
    """
    words = set(name.replace("-", " ").split())
    known = [each for each in PEAKS if set(each.split()) <= words]
    return PEAKS[max(known, key=len)] if known else None
