"""The project's tasks as TFDS datasets. Importing this imports no TFDS; its subpackages do."""
