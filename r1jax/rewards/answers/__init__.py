"""Final answers as values, and whether two of them are equal. See docs/answers.md."""
