"""The scores people read, most important first: label, name in scores.json, what to make of it."""

ROWS = (
    ("FID of samples", "fid", "lower is better"),
    ("FID floor (two halves of real pictures)", "floor_fid", "a perfect model's score"),
    ("FID of decoded noise", "noise_fid", "what the UNet has to beat"),
    ("rFID of the first stage", "rfid", "against other pictures, like the FID"),
    ("rFID against the same pictures", "rfid_same_pictures", "as published tables have it"),
    ("PSNR of the first stage, dB", "psnr_db", "higher is better"),
    ("precision", "precision", "of samples"),
    ("recall", "recall", "of samples"),
    ("floor precision", "floor_precision", "of real pictures"),
    ("floor recall", "floor_recall", "of real pictures"),
    ("class accuracy of samples", "class_accuracy", "judged by a classifier"),
    ("class accuracy of real pictures", "judge_accuracy", "the judge's own, held out"),
)
