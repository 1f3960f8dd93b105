"""Programs that show things: status, graph, report, fidelity, comparison of repositories. People call them.

They run no step and write only the report that was asked for.
"""
