"""Distillation: losses on arrays, and training of students by teachers as `(init, step)`."""
