"""Text in, token ids out, and back: vocabulary, chat template, streaming decoder. No torch."""
