{{- define "tcpip-bypass.platform" -}}
{{- get (.Files.Get "files/platforms.yaml" | fromYaml) .Values.platform | toYaml -}}
{{- end -}}

{{- define "tcpip-bypass.version" -}}
{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}

{{- define "tcpip-bypass.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ include "tcpip-bypass.version" . }}{{ end }}
{{- end -}}

{{- /* The labels that Kubernetes recommends. A DaemonSet's selector never changes: it has but the first. */ -}}
{{- define "tcpip-bypass.labels" -}}
app.kubernetes.io/name: tcpip-bypass
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ include "tcpip-bypass.version" . | quote }}
app.kubernetes.io/component: node
app.kubernetes.io/part-of: tcpip-bypass
app.kubernetes.io/managed-by: {{ .Values.managedBy | default .Release.Service }}
{{- end -}}

{{- /* Kubernetes before 1.30 knows AppArmor by an annotation, and refuses the field. Empty: no. */ -}}
{{- define "tcpip-bypass.has_apparmor_field" -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end -}}
