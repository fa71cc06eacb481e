"""Files and simulators made into arrays in physical units."""
