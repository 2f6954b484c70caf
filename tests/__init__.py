"""The suite mirrors the package, room by room; ``support`` holds what several rooms share."""
