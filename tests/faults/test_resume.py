def test_x(undisturbed):
    print(undisturbed[2]); print(undisturbed[0])
    import subprocess; print(subprocess.run(["find",str(undisturbed[1])],capture_output=True,text=True).stdout)
