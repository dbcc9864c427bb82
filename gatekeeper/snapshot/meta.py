"""The meta section of a snapshot: names, places, listeners and settings as JSON, made from a `Config`.

 version     1
 digest      SHA-256 of all files (hex)
 counts      {"rules", "sets_ranges": ranges over all sources, "v4_ranges", "v6_ranges", "classes", "rows"}
 default     {"action", "file", "line"}
 rules       [{"name", "action", "file", "line"}]
 listeners   [{"name", "protocol", "connect_timeout_s", "idle_timeout_s", "half_close_timeout_s",
               "max_responses", "max_sessions", "over_detail": detail index of a refusal by max_sessions,
               "ban_detail": detail index of a refusal by a ban,
               "on_exit": null, or where the kernel guards what others listen at: closed or open}]
 endpoints   [{"listener": index, "key", "protocol", "family", "host", "port", "address", "row": matrix row,
               "backend": {"family", "host", "port", "text"}}]     one for each socket, file order
 details     [[listener index, rule index or null, action, reason]]
 settings    {"workers", "metrics": {"family", "host", "port"} or null, "audit", "state", "kernel",
              "control": {"socket": path, off, or null: the usual place, "group": name or null},
              "on_reload": revoke or keep}
 files       [path]
"""
