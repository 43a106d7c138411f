"""Prompts of SWE-bench, by their name in the published program that builds the data sets with a `text`."""

from thinkstack.tasks.benchmarks.prompts import Prompt

PREMISE = "You will be provided with a partial code base and an issue statement explaining a problem to resolve."
"""First line of every published prompt; the published program for endpoints sends it as the system message."""
_SOURCE = "SWE-bench/SWE-bench at 7a21e05, swebench/inference: make_datasets/create_instance.py"
_PATCH = """--- a/file.py
+++ b/file.py
@@ -1,27 +1,35 @@
 def euclidean(a, b):
-    while b:
-        a, b = b, a % b
-    return a
+    if b == 0:
+        return a
+    return euclidean(b, a % b)
\x20
\x20
 def bresenham(x0, y0, x1, y1):
     points = []
     dx = abs(x1 - x0)
     dy = abs(y1 - y0)
-    sx = 1 if x0 < x1 else -1
-    sy = 1 if y0 < y1 else -1
-    err = dx - dy
+    x, y = x0, y0
+    sx = -1 if x0 > x1 else 1
+    sy = -1 if y0 > y1 else 1
\x20
-    while True:
-        points.append((x0, y0))
-        if x0 == x1 and y0 == y1:
-            break
-        e2 = 2 * err
-        if e2 > -dy:
+    if dx > dy:
+        err = dx / 2.0
+        while x != x1:
+            points.append((x, y))
             err -= dy
-            x0 += sx
-        if e2 < dx:
-            err += dx
-            y0 += sy
+            if err < 0:
+                y += sy
+                err += dx
+            x += sx
+    else:
+        err = dy / 2.0
+        while y != y1:
+            points.append((x, y))
+            err -= dx
+            if err < 0:
+                x += sx
+                err += dy
+            y += sy
\x20
+    points.append((x, y))
     return points"""
_END = "\n\n\n\n"
"""Blank lines that make_datasets and run_api.py of the published program add, two each."""
SWE_BENCH_PROMPTS = {
    "published": Prompt(
        text="{text}" + "\n\n",
        source="SWE-bench/SWE-bench at 7a21e05, swebench/inference/run_api.py, with the `text` of the file, as in "
        "princeton-nlp/SWE-bench_oracle and SWE-bench_bm25_13K; without one that of style-3",
    ),
    "style-3": Prompt(
        text=f"{PREMISE}\n<issue>\n{{question}}\n</issue>\n\n<code>\n{{code}}\n</code>\n\nHere is an example of a "
        "patch file. It consists of changes to the code base. It specifies the file names, the line numbers of each "
        "change, and the removed and added lines. A single patch file can contain changes to multiple files.\n<patch>\n"
        f"{_PATCH}\n</patch>\n\nI need you to solve the provided issue by generating a single patch file that I can "
        "apply directly to this repository using git apply. Please respond with a single patch file in the format "
        f"shown above.\nRespond below:{_END}",
        source=f"{_SOURCE}, prompt_style_3, and run_api.py",
    ),
    "style-2": Prompt(
        text=f"{PREMISE}\n<issue>\n{{question}}\n</issue>\n<code>\n{{code}}\n</code>\nI need you to solve this issue "
        "by generating a single patch file that I can apply directly to this repository using git apply. Please "
        f"respond with a single patch file in the following format.\n<patch>\n{_PATCH}\n</patch>{_END}",
        source=f"{_SOURCE}, prompt_style_2, and run_api.py",
    ),
}
