"""rlkern inside other people's trainers: docs/integrations has a page for each.

Nothing here is imported by rlkern itself, and importing a module of it changes nothing, but for
`rlkern.integrations.verl`, whose import is verl's own way of saying so. What replaces something
does so in `enable()`, which returns a `Handle` that puts it back.
"""
