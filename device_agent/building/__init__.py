"""Engines that the device builds for itself: chosen, built in a process of their own, kept."""
