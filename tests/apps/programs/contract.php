<?php
// The contract's server: GET /bytes/SIZE, POST /echo.

if ($_SERVER['REQUEST_METHOD'] === 'POST') {
    $body = file_get_contents('php://input');
} else {
    $size = (int) substr($_SERVER['DOCUMENT_URI'], strlen('/bytes/'));
    $words = range(0, max(0, intdiv($size + 3, 4) - 1));
    $body = '';
    foreach (array_chunk($words, 10000) as $part) {
        $body .= pack('N*', ...$part);
    }
    $body = substr($body, 0, $size);
}
header('Content-Type: application/octet-stream');
header('Content-Length: ' . strlen($body));
echo $body;
