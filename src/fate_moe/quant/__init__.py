"""INT4 experts whose first half is an INT2 expert: the record layout, the quantizer, the codec."""
