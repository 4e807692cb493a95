# SPDX-License-Identifier: Apache-2.0
"""What an application can see of the bypass: every socket behaviour, over TCP and over the bypass.

A scenario opens a connection, does something an application may do, and logs what it saw. It is run
over plain TCP, over the bypass, and on sockets that sit in the sockhash while every byte goes by
TCP, each time with the client and with the server as the sender. What the transcripts disagree on
is what an application could notice, and stands in docs/limits.md, which is written from a run.
"""
