-- SPDX-License-Identifier: Apache-2.0
-- Prints what wrk measured in a form for programs: the totals, then each latency and its count.
done = function(summary, latency, requests)
   local e = summary.errors
   io.write(string.format("totals %d %d %d %d\n", summary.requests, summary.duration,
      e.connect + e.read + e.write + e.timeout, e.status))
   for i = 1, #latency do
      local us, count = latency(i)
      io.write(string.format("latency %d %d\n", us, count))
   end
end
