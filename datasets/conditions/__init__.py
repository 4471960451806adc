"""What is asked of a picture, as arrays: words as tokens, boxes as tokens."""
