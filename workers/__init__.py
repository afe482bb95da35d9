"""Running mathematics on a device: data, loops, engines, jobs, evaluation."""
