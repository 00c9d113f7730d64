"""What you start from a cell or a shell: demo, doctor, JupyterLab, magics, player."""
