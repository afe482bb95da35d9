"""Optimiser steps behind one protocol: plain torch and DeepSpeed."""
