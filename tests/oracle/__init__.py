"""What the tests compare with: real and tiny bases, PEFT's adapters for them, its answers."""
