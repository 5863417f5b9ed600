"""The run file: load with positions, validate, judge, freeze."""
