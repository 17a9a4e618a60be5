"""MOVE EARLY. A pure queue of reads, and the mover that carries them out."""
