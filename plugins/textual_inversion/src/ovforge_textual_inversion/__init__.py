"""Textual inversions on OpenVINO models: new words for the tokenizer and the text encoder."""
