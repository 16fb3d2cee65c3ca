"""What makes an artefact fit to be handed on: the cards that describe it to people and to other tools."""
