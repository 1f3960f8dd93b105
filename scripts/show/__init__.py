"""Things to look at: status, graph, report, fidelity, comparison of repositories. People call these; they run no step
and write only the report that is asked for.
"""
