"""Questions that are answered: how the answer was measured, kept so that it can be measured again."""
